"""The migrations of one daemon, by id. (Interface first; the sessions come with the pager.)"""
