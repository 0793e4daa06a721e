"""Methods of recipes, named by `configs/method/*.yaml`. Each assembles samplers or tuners of the library, no mathematics of its own."""
