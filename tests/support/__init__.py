"""What tests of several rooms share: small models, runs, clusters, and faults to inject."""
