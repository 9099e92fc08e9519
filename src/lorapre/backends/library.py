import torch
def takes(X, operations): return False
def products(X, Y): raise AssertionError
def inverse_roots(G): raise AssertionError

def prepare(): return None
def warn(m): print(m)
