"""Web application: server, access control, uploads, and the pages of labelling, chat and studio."""
