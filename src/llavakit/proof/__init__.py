"""Golden cases, costs and miniatures: what llavakit proves about itself."""
