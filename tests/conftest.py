"""What holds for every test."""

from hypothesis import settings

# Shared runners stall now and then: how long an example takes is no property of the code.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
