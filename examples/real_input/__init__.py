"""Real rows, real targets: which sources does the selection for each task come from?"""
