"""The app: a server in front of models, for one's own browser. Needs the extra ``app``."""
