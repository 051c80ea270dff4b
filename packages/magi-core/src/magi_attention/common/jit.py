# SPDX-License-Identifier: Apache-2.0
"""Empty: an import path of older versions, which compiled kernels at run time. This package's kernels are not."""
