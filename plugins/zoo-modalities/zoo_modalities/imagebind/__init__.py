"""ImageBind (Girdhar et al. 2023, arXiv 2305.05665): six modalities in one space, each trained against images only."""
