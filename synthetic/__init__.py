"""Settings whose answers are known in closed form, each beside its simulation."""
