//! The retry budget: how many further attempts the requests of the last seconds pay for, so that an outage is not made worse.
//!
//! After Finagle's `RetryBudget`: every request deposits a share of a retry, a retry withdraws a whole one, deposits are worth
//! nothing after [`WINDOW`], and a minimum per second is free for pools with little traffic.

use std::collections::VecDeque;

use shared::time::{Dur, Time};

/// How long a deposit counts (Finagle's default).
const WINDOW: Dur = Dur::from_secs(10);
/// Deposits are kept for each second.
const SLOTS: usize = 10;
/// A whole retry, in the unit of the account.
const RETRY: u64 = 1_000;

/// The account.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    /// What a request deposits, in thousandths of a retry.
    deposit: u64,
    /// What is there without any request.
    reserve: u64,
    /// Deposits and withdrawals by second, the oldest first.
    seconds: VecDeque<Second>,
    refused: u64,
}

#[derive(Clone, Copy, Debug)]
struct Second {
    number: u64,
    deposited: u64,
    withdrawn: u64,
}

impl RetryBudget {
    /// A budget of `ratio` retries for each request and `per_second` besides.
    pub(crate) fn new(ratio: f64, per_second: u32) -> RetryBudget {
        let deposit = (ratio * RETRY as f64).round() as u64;
        let reserve = u64::from(per_second) * SLOTS as u64 * RETRY;
        RetryBudget { deposit, reserve, seconds: VecDeque::with_capacity(SLOTS + 1), refused: 0 }
    }

    /// A request came.
    pub(crate) fn request(&mut self, now: Time) {
        let deposit = self.deposit;
        self.second(now).deposited += deposit;
    }

    /// Takes one retry out, if it is there.
    pub(crate) fn withdraw(&mut self, now: Time) -> bool {
        self.second(now);
        let (deposited, withdrawn) = self.seconds.iter().fold((0, 0), |(d, w), s| (d + s.deposited, w + s.withdrawn));
        let enough = self.reserve + deposited >= withdrawn + RETRY;
        if enough {
            self.second(now).withdrawn += RETRY;
        } else {
            self.refused += 1;
        }
        enough
    }

    /// Retries that there was no budget for.
    pub(crate) const fn refused(&self) -> u64 {
        self.refused
    }

    /// The current second, without those that are too old.
    fn second(&mut self, now: Time) -> &mut Second {
        let number = now.since(Time::ZERO).as_nanos() / 1_000_000_000;
        let is_new = self.seconds.back().is_none_or(|s| s.number < number);
        if is_new {
            let oldest = number.saturating_sub(WINDOW.as_nanos() / 1_000_000_000 - 1);
            while self.seconds.front().is_some_and(|s| s.number < oldest) {
                self.seconds.pop_front();
            }
            self.seconds.push_back(Second { number, deposited: 0, withdrawn: 0 });
        }
        self.seconds.back_mut().unwrap_or_else(|| unreachable!("there is one now"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::ZERO + Dur::from_millis(ms)
    }

    fn granted(budget: &mut RetryBudget, now: Time, asked: u32) -> usize {
        (0..asked).filter(|_| budget.withdraw(now)).count()
    }

    #[test]
    fn requests_pay_for_retries() {
        let mut budget = RetryBudget::new(0.2, 0);
        (0..50).for_each(|_| budget.request(at(0)));
        assert_eq!(granted(&mut budget, at(1), 20), 10);
        assert_eq!(budget.refused(), 10);
        (0..5).for_each(|_| budget.request(at(2)));
        assert_eq!(granted(&mut budget, at(2), 20), 1);
    }

    #[test]
    fn a_minimum_is_free_and_comes_back() {
        let mut budget = RetryBudget::new(0.0, 2);
        assert_eq!(granted(&mut budget, at(500), 100), 20);
        assert_eq!(granted(&mut budget, at(9_999), 100), 0);
        assert_eq!(granted(&mut budget, at(10_000), 100), 20);
    }

    #[test]
    fn what_is_old_pays_for_nothing() {
        let mut budget = RetryBudget::new(1.0, 0);
        (0..5).for_each(|_| budget.request(at(0)));
        assert_eq!(granted(&mut budget, at(10_000), 9), 0);
        (0..3).for_each(|i| budget.request(at(10_000 + 4_000 * i)));
        assert_eq!(granted(&mut budget, at(18_000), 9), 3);
        assert!(budget.seconds.len() <= SLOTS);
    }

    #[test]
    fn time_that_stands_still_or_is_late_is_no_matter() {
        let mut budget = RetryBudget::new(1.0, 0);
        budget.request(at(5_000));
        budget.request(at(4_000));
        assert_eq!(granted(&mut budget, at(4_500), 9), 2);
    }
}
