"""Where what is kept between runs lies: trained priors, compiled programs, and the answers of slow oracles."""

from __future__ import annotations

import os
from pathlib import Path


def cache_path(named: str | None = None) -> Path | None:
    """Return the cache's folder: `named`, RGDIFF_CACHE, or rgdiff in the user's cache folder.

    It is None where there is no home folder to have it in.
    """
    chosen = named or os.environ.get("RGDIFF_CACHE")
    above = chosen or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(above).expanduser().absolute() / ("" if chosen else "rgdiff")
    except RuntimeError:
        return None
