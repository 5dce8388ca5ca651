//! The norm that joins what a step takes when it only reads weights with what it takes when it only computes.

/// `(a^p + b^p)^(1/p)` with `p` in sixteenths, rounded to whole picoseconds.
///
/// Only multiplications, divisions and square roots, which IEEE 754 rounds exactly: every platform gives the same integer.
pub(crate) fn p_norm(a: u64, b: u64, p_16ths: u32) -> u64 {
    let (low, high) = (a.min(b), a.max(b));
    if low == 0 {
        return high;
    }
    let ratio = low as f64 / high as f64;
    let sum = 1.0 + int_power(sixteenth_root(ratio), p_16ths);
    (high as f64 * root(sum, p_16ths)).round() as u64
}

fn sixteenth_root(x: f64) -> f64 {
    x.sqrt().sqrt().sqrt().sqrt()
}

fn int_power(mut base: f64, mut exponent: u32) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// `s^(16 / k)` for `s` in 1..=2: Newton's method on the k-th root of `s`, then its 16th power.
fn root(s: f64, k: u32) -> f64 {
    let mut z = 1.0 + (s - 1.0) / f64::from(k);
    for _ in 0..4 {
        let power = int_power(z, k - 1);
        z -= (power * z - s) / (f64::from(k) * power);
    }
    int_power(z, 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_norm_has_its_limits() {
        let check = |a, b, p, expect: u64| assert_eq!(p_norm(a, b, p), expect, "p_norm({a}, {b}, {p}/16)");
        check(1_000_000, 0, 20, 1_000_000);
        check(0, 1_000_000, 20, 1_000_000);
        check(1_000_000, 2_000_000, 16, 3_000_000);
        check(3_000_000, 4_000_000, 32, 5_000_000);
        // A large exponent takes the larger, a hard roofline.
        check(1_000_000, 2_000_000, 1600, 2_000_000);
    }

    proptest! {
        #[test]
        fn the_norm_lies_between_the_larger_and_the_sum(a in 1u64..1 << 40, b in 1u64..1 << 40, p in 16u32..64) {
            let n = p_norm(a, b, p);
            let slack = (a + b) / 1_000_000_000 + 1;
            prop_assert!(n + slack >= a.max(b) && n <= a + b + slack, "{n}");
        }
    }
}
