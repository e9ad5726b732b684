"""Server rules, defences and server adversaries: one file a family. Installed as `fedtrust.strategies`."""

if __name__ != "fedtrust.strategies":
    raise ImportError("import fedtrust.strategies; under the bare name 'strategies' this package would be a second copy of itself")
