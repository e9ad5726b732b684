"""Client behaviours, honest and malicious: one file a family. Installed as `fedtrust.clients`."""

if __name__ != "fedtrust.clients":
    raise ImportError("import fedtrust.clients; under the bare name 'clients' this package would be a second copy of itself")
