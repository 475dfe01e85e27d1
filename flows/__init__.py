"""The Prefect flow and its deployments."""
