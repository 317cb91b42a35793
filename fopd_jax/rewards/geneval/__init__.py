"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): what was asked for against what is found."""
