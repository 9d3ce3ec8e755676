"""Load for a server over HTTP: workloads, the client, and what is reported of a run."""
