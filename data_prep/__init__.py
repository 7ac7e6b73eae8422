"""Offline converters from files people have to the sharded datasets that mpifl trains on."""
