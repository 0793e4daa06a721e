"""Recipes: a domain, a judge, a prior, a reward and methods, composed by a config and run from the command line.

`typing` has the protocols of the parts; `compose` reads configs and calls constructors, `run` runs what they describe;
`priors`, `values` and `methods` are the parts that `configs/` name.
"""
