"""impl "triton": both maxima from one visit of a tile of token similarities, gradients as products with what the maxima chose."""
