"""Claims of papers about architectures, as comparisons that run: ``conf/claim/*.yaml`` and ``zoo claims``."""
