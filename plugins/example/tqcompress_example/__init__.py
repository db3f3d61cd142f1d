"""An example of a tqcompress plugin: the quantizer `sign`."""
