"""The classroom: what students hand in, how it is run without being trusted, and how it is marked."""
