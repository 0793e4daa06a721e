"""Methods of recipes: what `configs/method/*.yaml` name. Each assembles samplers or tuners of the library, no mathematics of its own."""
