# Every target is a script of the same name in scripts/; read those.
.DEFAULT_GOAL := help
.PHONY: help install demo test check lint lock

help:     ## say what there is
	@sed -n 's/^\([a-z]*\): *## /  make \1	/p' Makefile | expand -t 18

install:  ## make .venv: torch (TORCH_INDEX=url chooses its build), the locked packages, this project
	@scripts/install

demo:     ## set up, then run the whole flow on a tiny model and show that the selection helps
	@scripts/demo

test:     ## set up, then lint and run every test
	@scripts/test

check:    ## lint and run the quick tests
	@scripts/check

lint:     ## ruff and mypy
	@scripts/lint

lock:     ## resolve the dependencies into the two lock files
	@scripts/lock
