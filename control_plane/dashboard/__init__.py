"""The dashboard: a web page that shows operators what the control plane knows, and its server."""
