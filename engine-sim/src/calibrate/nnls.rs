//! Least squares with coefficients that are not negative (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23).
//!
//! Works on the normal equations, which for the half dozen well-scaled columns of a step model are as good as a decomposition of
//! the rows and much cheaper to change by one column.

/// Most columns that are taken.
pub const MAX_COLUMNS: usize = 8;

/// The coefficients `x >= 0` that minimise `|a x - b|^2`; `columns` are those of `a`, each as long as `b`.
pub fn nnls(columns: &[&[f64]], b: &[f64]) -> Vec<f64> {
    let n = columns.len();
    assert!(
        n <= MAX_COLUMNS && columns.iter().all(|c| c.len() == b.len()),
        "at most {MAX_COLUMNS} columns, as long as b"
    );
    // Columns of length 1 keep the normal equations well conditioned: contexts are a million times sequences.
    let scale: Vec<f64> = columns.iter().map(|c| dot(c, c).sqrt()).map(|s| if s > 0.0 { s } else { 1.0 }).collect();
    let gram: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| dot(columns[i], columns[j]) / (scale[i] * scale[j])).collect()).collect();
    let right: Vec<f64> = (0..n).map(|i| dot(columns[i], b) / scale[i]).collect();
    let x = solve(&gram, &right);
    x.iter().zip(&scale).map(|(x, s)| x / s).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The active-set method: columns enter by the steepest gradient and leave when their coefficient would turn negative.
fn solve(gram: &[Vec<f64>], right: &[f64]) -> Vec<f64> {
    let n = right.len();
    let tolerance = 1e-10 * right.iter().fold(0.0, |m: f64, r| m.max(r.abs()));
    let mut x = vec![0.0; n];
    let mut active: Vec<usize> = Vec::new();
    // Each column enters and leaves a few times at most; the bound guards against cycling by rounding.
    for _ in 0..10 * n.max(1) {
        let gradient = |i: usize| right[i] - (0..n).map(|j| gram[i][j] * x[j]).sum::<f64>();
        let best = (0..n).filter(|i| !active.contains(i)).map(|i| (gradient(i), i)).max_by(|a, b| a.0.total_cmp(&b.0));
        let Some((steepest, i)) = best.filter(|(g, _)| *g > tolerance) else { break };
        debug_assert!(steepest > 0.0);
        active.push(i);
        while let Some(inner) = unconstrained(gram, right, &active) {
            if inner.iter().all(|v| *v > 0.0) {
                x.fill(0.0);
                active.iter().zip(&inner).for_each(|(&j, v)| x[j] = *v);
                break;
            }
            let towards = active.iter().zip(&inner).filter(|(_, v)| **v <= 0.0).map(|(&j, v)| x[j] / (x[j] - v));
            let step = towards.fold(1.0, f64::min);
            active.iter().zip(&inner).for_each(|(&j, v)| x[j] += step * (v - x[j]));
            let before = active.len();
            active.retain(|&j| x[j] > 1e-14);
            if active.len() == before {
                break;
            }
        }
    }
    x.iter().map(|v| v.max(0.0)).collect()
}

/// Solves the equations of the active columns alone, by Cholesky; `None` without any, columns that depend on others get 0.
fn unconstrained(gram: &[Vec<f64>], right: &[f64], active: &[usize]) -> Option<Vec<f64>> {
    let k = active.len();
    if k == 0 {
        return None;
    }
    let mut l = vec![vec![0.0; k]; k];
    for i in 0..k {
        for j in 0..=i {
            let sum = gram[active[i]][active[j]] - (0..j).map(|m| l[i][m] * l[j][m]).sum::<f64>();
            l[i][j] = match i == j {
                true => sum.max(0.0).sqrt(),
                false if l[j][j] > 0.0 => sum / l[j][j],
                false => 0.0,
            };
        }
        // A pivot this small means the column is a sum of the others.
        if l[i][i] < 1e-7 {
            l[i].fill(0.0);
        }
    }
    let divide = |sum: f64, pivot: f64| if pivot > 0.0 { sum / pivot } else { 0.0 };
    let mut y = vec![0.0; k];
    for i in 0..k {
        y[i] = divide(right[active[i]] - (0..i).map(|m| l[i][m] * y[m]).sum::<f64>(), l[i][i]);
    }
    let mut x = vec![0.0; k];
    for i in (0..k).rev() {
        x[i] = divide(y[i] - (i + 1..k).map(|m| l[m][i] * x[m]).sum::<f64>(), l[i][i]);
    }
    Some(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(columns: &[&[f64]], b: &[f64], expect: &[f64]) {
        let found = nnls(columns, b);
        let near = found.iter().zip(expect).all(|(f, e)| (f - e).abs() < 1e-6 * e.abs().max(1.0));
        assert!(near && found.len() == expect.len(), "found {found:?}, expected {expect:?}");
    }

    #[test]
    fn exact_data_gives_its_coefficients() {
        let (one, n, c) = ([1.0; 5], [1.0, 2.0, 4.0, 8.0, 9.0], [1e6, 3e6, 1e6, 7e6, 2e6]);
        let b: Vec<f64> = (0..5).map(|i| 3.0 + 0.5 * n[i] + 2e-6 * c[i]).collect();
        check(&[&one, &n, &c], &b, &[3.0, 0.5, 2e-6]);
    }

    #[test]
    fn what_would_be_negative_is_zero_and_the_rest_is_the_best_without_it() {
        check(&[&[1.0, 1.0, 1.0], &[0.0, 1.0, 2.0]], &[3.0, 2.0, 1.0], &[2.0, 0.0]);
    }

    #[test]
    fn a_column_that_says_nothing_new_does_no_harm() {
        let (a, double) = ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]);
        let found = nnls(&[&a, &double], &[2.0, 4.0, 6.0]);
        assert!((found[0] + 2.0 * found[1] - 2.0).abs() < 1e-6, "{found:?}");
        check(&[&[0.0, 0.0]], &[1.0, 1.0], &[0.0]);
    }

    proptest! {
        /// The Karush-Kuhn-Tucker conditions: no coefficient can be changed within its bounds to come closer.
        #[test]
        fn no_allowed_change_comes_closer(cells in prop::collection::vec(0.0f64..10.0, 40), b in prop::collection::vec(-10.0f64..10.0, 10)) {
            let columns: Vec<&[f64]> = cells.chunks(10).collect();
            let x = nnls(&columns, &b);
            let residual: Vec<f64> = (0..10).map(|r| b[r] - columns.iter().zip(&x).map(|(c, x)| c[r] * x).sum::<f64>()).collect();
            for (column, x) in columns.iter().zip(&x) {
                let gradient = dot(column, &residual);
                prop_assert!(*x >= 0.0 && gradient < 1e-6 && (*x == 0.0 || gradient > -1e-6), "x {x}, gradient {gradient}");
            }
        }
    }
}
