"""Published claims, checked by name: ``mupjax reproduce``."""
