"""`python -m gradstore` is `gradstore`."""

from gradstore.cli import main

main()
