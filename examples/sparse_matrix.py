"""
A sparse matrix of your own
===========================

No model and no image: both ends of the singular values of a sparse matrix, with proof, beside what NumPy finds from the
dense one.
"""

# %%
# The matrix
# ----------
# The incidence matrix of a random graph: a row for each edge, with 1 and −1 at the two vertices that it joins. Its
# singular values are the square roots of the eigenvalues of the graph's Laplacian matrix, and as many of them are zero
# as the graph has connected parts.
import matplotlib.pyplot as plt
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, laplacian

from fisherop import singular_triplets

rng = np.random.default_rng(0)
n_edges, n_vertices = 2400, 800
ends = np.array([rng.choice(n_vertices, 2, replace=False) for _ in range(n_edges)])
rows = np.repeat(np.arange(n_edges), 2)
A = csr_array((np.tile([1.0, -1.0], n_edges), (rows, ends.ravel())), shape=(n_edges, n_vertices))
print(f"A is {A.shape[0]} × {A.shape[1]}, with {A.nnz} elements that aren't zero")

# %%
# Both ends at once
# -----------------
# The five largest and the five smallest. `tol` is relative to the square of the largest: what is *null to tol* is
# proven to lie below the root of tol, 10⁻⁵ of the largest, and no more is known of it.
found = singular_triplets(A, k=5, tol=1e-10, rng=0)
print(found)
u, s, vh = found  # as of scipy.sparse.linalg.svds, but descending

# %%
# The truth
# ---------
# NumPy takes the dense matrix, and finds all.
truth = np.linalg.svd(A.toarray(), compute_uv=False)
error = np.abs(s - truth[found.index]).max() / truth[0]
print(f"Largest deviation from numpy.linalg.svd: {error:.0e} of the largest singular value")
residuals = np.linalg.norm(A @ vh.T - u * s, axis=0) / truth[0]
print("‖A v − σ u‖, of the largest singular value:", ", ".join(f"{residual:.0e}" for residual in residuals))

# %%
# What the smallest mean
# ----------------------
# One zero for each connected part, and then the algebraic connectivity, by which a random walk on the graph forgets
# where it began.
adjacency = abs(A.T) @ abs(A)
adjacency.setdiag(0)
n_parts = connected_components(adjacency, directed=False)[0]
least = np.linalg.eigvalsh(laplacian(adjacency).toarray())
print(f"The graph has {n_parts} connected parts; {np.count_nonzero(truth < 1e-8)} singular values are zero.")
print(f"The smallest eigenvalues of its Laplacian matrix: {', '.join(f'{value:.4f}' for value in least[:5].clip(0))}")

figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
ax.plot(truth, color="0.6", label="all, by numpy.linalg.svd")
ax.plot(found.index, s, "o", label="singular_triplets")
ax.set(xlabel="index", ylabel="singular value")
ax.legend()
figure.savefig("sparse_matrix.png")
print("\nFigure: sparse_matrix.png")
