"""The tests of the image run with `make test-image`, which says in IMAGE and BASE what it has built from what."""

import os

collect_ignore = [] if "IMAGE" in os.environ else ["test_image.py", "test_registry.py"]
