"""`deadpool doctor`: is this machine, and the way to the others, fit for a job?"""
