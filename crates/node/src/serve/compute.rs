//! The engine's thread: takes one step at a time, reports each finished layer and the result. It decides nothing.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use millrace_core::engine::{Engine, EngineError, Sampled, Step};
use millrace_core::node::Input;
use tokio::sync::mpsc;

use super::event::Event;
use super::{NodeConfig, priority};

/// Hands steps to the engine; at most one is ever in flight.
pub(super) struct Compute {
    steps: SyncSender<Step>,
}

impl Compute {
    /// Starts the thread. It ends when this handle is dropped.
    pub(super) fn start(engine: Box<dyn Engine>, events: mpsc::Sender<Event>, config: &NodeConfig) -> std::io::Result<Self> {
        let (steps, inbox) = sync_channel(1);
        let (role, by_layer) = (config.role, config.by_layer);
        std::thread::Builder::new().name("engine".into()).spawn(move || {
            priority::lower(role);
            run(engine, &inbox, &events, by_layer);
        })?;
        Ok(Self { steps })
    }

    /// Begins a step. False when the engine's thread is gone.
    pub(super) fn begin(&self, step: Step) -> bool {
        self.steps.try_send(step).is_ok()
    }
}

fn run(mut engine: Box<dyn Engine>, inbox: &Receiver<Step>, events: &mpsc::Sender<Event>, by_layer: bool) {
    // One that is not told, because the queue is full or closed or on purpose, only delays its hand-over: `Computed` makes every layer ready.
    let tell = |layer| drop(by_layer.then(|| events.try_send(Event::Node(Input::Layer(layer)))));
    while let Ok(step) = inbox.recv() {
        let started = Instant::now();
        let result = guarded(engine.as_mut(), &step, &tell);
        let elapsed_us = started.elapsed().as_micros() as u64;
        if events.blocking_send(Event::Node(Input::Stepped { result, elapsed_us })).is_err() {
            return;
        }
    }
}

/// A panic inside the engine fails the step, not the node: its sequences end with an error and the next step starts afresh.
fn guarded(engine: &mut dyn Engine, step: &Step, tell: &dyn Fn(u16)) -> Result<Vec<Sampled>, EngineError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| engine.step(step, &mut |layer| tell(layer))))
        .unwrap_or_else(|_| Err(EngineError("the engine panicked in this step".into())))
}
