"""The embedded trace view: spans that workloads report, the last traces of them, and what operators ask about those."""
