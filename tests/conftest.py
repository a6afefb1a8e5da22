"""What holds for every test: hypothesis measures no time, since machines differ and are shared."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("xception", deadline=None)
settings.load_profile("xception")
