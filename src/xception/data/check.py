"""Every image decoded once before training, so that a bad one is known, named and left out from the start.

Why before and not on the way: order, splits and augmentation then follow the cleaned list, and a run with damaged files
ends with the very weights of a run without them. Images in memory need no check.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from xception.data.labels import printable
from xception.data.split import ArraySplit, BadImage, DataSource, Split, concatenate, drop_samples
from xception.errors import ConfigError, DataError, ImageError

_REASONS_SHOWN = 3
_WINDOW = 1024  # images handed to the threads at a time, so that a million files do not queue up a million tasks


def check_images(
    split: Split,
    *,
    max_bad_share: float = 0.01,
    workers: int | None = None,
    on_bad: Callable[[BadImage], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[BadImage]:
    """Decode every image of `split` once.

    Args:
        split: Samples; those in memory are not looked at.
        max_bad_share: Share of bad images, 0 to 1, above which the data is refused.
        workers: Threads; by default one a processor, at most 16 (Pillow decodes outside Python's lock).
        on_bad: Called with each bad image, in the split's order.
        progress: Called now and then with (images done, images in all).

    Returns:
        The bad images, in the split's order.

    Raises:
        DataError: As soon as more than `max_bad_share` of all images are bad; says the share and the first reasons.
    """
    if not 0 <= max_bad_share <= 1:
        raise ConfigError(f"max_bad_share: expected 0 to 1, got {max_bad_share!r}")
    total = len(split)
    if isinstance(split, ArraySplit) or total == 0:
        return []
    bad: list[BadImage] = []
    allowed = max_bad_share * total
    with closing(_reasons(split, workers or min(16, os.cpu_count() or 1))) as reasons:
        for done, reason in enumerate(reasons, start=1):
            if reason is not None:
                bad.append(BadImage(split.keys[done - 1], reason))
                if on_bad is not None:
                    on_bad(bad[-1])
                if len(bad) > allowed:
                    first = "; ".join(map(str, bad[:_REASONS_SHOWN]))
                    more = "; ..." if len(bad) > _REASONS_SHOWN else ""
                    raise DataError(
                        f"{len(bad):,} of the first {done:,} of {total:,} images cannot be decoded, more than the "
                        f"limit of {max_bad_share:.3%} of all: {first}{more}"
                    )
            if progress is not None and (done % _WINDOW == 0 or done == total):
                progress(done, total)
    return bad


def _reasons(split: Split, workers: int) -> Generator[str | None]:
    """Why each image cannot be decoded, None where it can, in order."""

    def reason(index: int) -> str | None:
        try:
            split.image(index)
        except ImageError as error:
            return str(error)
        return None

    pool = ThreadPoolExecutor(workers)
    try:
        for start in range(0, len(split), _WINDOW):
            yield from pool.map(reason, range(start, min(start + _WINDOW, len(split))))
    finally:  # whoever leaves early, as after a signal, waits for the images at hand and not for the queue
        pool.shutdown(cancel_futures=True)


def clean_source(
    source: DataSource,
    *,
    max_bad_share: float = 0.01,
    workers: int | None = None,
    on_bad: Callable[[BadImage], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DataSource, list[BadImage]]:
    """Check all images of all parts and leave the bad ones out, as if their files had never been there.

    The share is that of the whole data set. Parts that we dealt are dealt anew from the images that are left. A run
    that is resumed need not decode everything again: record the keys and give them to `drop_samples`.

    Raises:
        DataError: Too many bad images, or a class that has none left to train on.
    """
    bad = check_images(
        concatenate(list((source.given or source.splits).values())),
        max_bad_share=max_bad_share,
        workers=workers,
        on_bad=on_bad,
        progress=progress,
    )
    try:
        return drop_samples(source, [image.key for image in bad]), bad
    except DataError as error:
        raise DataError(f"{error}, after {len(bad)} bad images were left out ({printable(str(bad[0]))})") from None
