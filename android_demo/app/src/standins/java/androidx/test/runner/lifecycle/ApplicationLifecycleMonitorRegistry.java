package androidx.test.runner.lifecycle;

public final class ApplicationLifecycleMonitorRegistry {
    private static ApplicationLifecycleMonitor monitor;

    private ApplicationLifecycleMonitorRegistry() {}

    public static ApplicationLifecycleMonitor getInstance() {
        if (monitor == null) throw new IllegalStateException("no monitor is registered");
        return monitor;
    }

    public static void registerInstance(ApplicationLifecycleMonitor registered) {
        monitor = registered;
    }
}
