//! The receiver's process.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::runtime::Runtime;

use super::message::{Answer, Counters, Order, Role};
use super::{Node, not_for};
use crate::overhead::cpu;
use crate::overhead::receiver::{Limits, Receiver};

pub(super) struct ReceiverNode(Receiver);

impl ReceiverNode {
    pub(super) fn start(runtime: &Runtime, storage: u64) -> Result<ReceiverNode, String> {
        let _runtime = runtime.enter();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let receiver = Receiver::start(any, Limits { storage, ..Limits::default() });
        receiver.map(ReceiverNode).map_err(|e| format!("cannot listen: {e}"))
    }
}

impl Node for ReceiverNode {
    fn urls(&self) -> Vec<String> {
        vec![format!("http://{}", self.0.address())]
    }

    fn handle(&mut self, runtime: &Runtime, order: Order) -> Result<Answer, String> {
        match order {
            Order::Counters => {
                Ok(Answer::Counters(Counters { cpu_nanos: cpu::of_this_process(), ..Counters::default() }))
            }
            Order::Health(health) => {
                runtime.block_on(self.0.set_health(health)).map(|()| Answer::Done).map_err(|e| e.to_string())
            }
            Order::Take => Ok(Answer::Taken(self.0.take())),
            Order::Decode => self.0.decode().map(Answer::Decoded).map_err(|e| e.to_string()),
            Order::Start(_) | Order::Arm(_) | Order::Reset | Order::Flush(_) | Order::Served | Order::Delay(_) => {
                not_for(Role::Receiver)
            }
        }
    }

    fn stop(self: Box<Self>, _: &Runtime) {}
}
