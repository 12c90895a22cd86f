"""Operations written out with their gradients, where autograd would keep or pass over more than it has to."""
