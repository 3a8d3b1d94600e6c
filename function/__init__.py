"""The function: the Python that runs in the container and behind http://localhost:8080."""
