"""`python -m tqcompress.plugins.lmcache server ...`: the command `lmcache`, knowing the serde.

LMCache finds devices and storage by themselves, but not serdes: somebody must register them in its process.
"""

from lmcache.cli.main import main

from . import register

if __name__ == "__main__":
    register()
    main()
