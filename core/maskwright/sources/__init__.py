"""Data: embedded defaults and the user's own files."""

EMBEDDED_IMAGES = ("photographs", "rotated-photographs", "digits")
"""Images that come with scikit-learn and scikit-image, by the names that `load_images` and `--data` know."""

EMBEDDED_TEXT = ("standard-library",)
"""The same for text."""
