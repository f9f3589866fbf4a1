"""One folder per published system; each holds all that only this system has."""
