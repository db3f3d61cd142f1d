"""Built-in plugins: one file each, with one class and one hook. They use only tqcompress's public API."""
