"""llavakit: every published system of the LLaVA family in one library."""
