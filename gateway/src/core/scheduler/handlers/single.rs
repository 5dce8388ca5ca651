//! `single-profile-handler`: one profile chooses one endpoint.

use shared::time::Time;

use crate::core::config::ProfileConfig;
use crate::core::scheduler::handlers::Decision;
use crate::core::scheduler::profile::Profile;
use crate::core::scheduler::registry::Reads;
use crate::core::scheduler::{Room, Run};

/// The handler and its profile.
#[derive(Debug)]
pub(crate) struct Single {
    profile: Profile,
}

impl Single {
    pub(super) fn new(profile: &ProfileConfig) -> Single {
        Single { profile: Profile::new(profile) }
    }

    pub(super) const fn reads(&self) -> Reads {
        self.profile.reads()
    }

    pub(super) fn schedule(&self, at: Time, room: &mut Room, run: &mut Run<'_>) -> (Option<Decision>, Time) {
        let (chosen, at) = self.profile.run(at, room, run);
        (chosen.map(Decision::alone), at)
    }
}
