"""Tests of the image: `make test-image` and `make test-sam` run them, and say in IMAGE and BASE, or SAM, with what."""

import os

collect_ignore = [] if "IMAGE" in os.environ else ["test_image.py", "test_registry.py"]
if "SAM" not in os.environ:
    collect_ignore.append("test_sam.py")
