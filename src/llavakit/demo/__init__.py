"""`python -m llavakit.demo`: a tiny model trained, evaluated and shown."""
