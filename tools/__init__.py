"""Scripts. A package, so that they find each other from any folder."""
