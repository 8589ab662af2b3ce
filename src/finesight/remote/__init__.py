"""Files from hubs, archives and the web: fetched whole and verified, or refused."""
