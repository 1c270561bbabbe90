package org.mobilemm.demo

import android.app.Application
import android.content.ComponentCallbacks2

/** What outlives screens: the models on this device, and the one conversation. */
open class DemoApplication : Application() {
    lateinit var models: Models
        private set
    lateinit var chat: Chat
        private set
    lateinit var imports: Imports
        private set
    lateinit var benchmarks: Benchmarks
        private set

    override fun onCreate() {
        super.onCreate()
        models = Models(this)
        chat = Chat(this, models)
        imports = Imports(models, chat)
        benchmarks = Benchmarks(this, models, chat)
    }

    // Newer systems send only the levels of the background; older ones all of them.
    @Suppress("DEPRECATION")
    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        // In the background, or while the system runs short: what can be computed again is given back.
        if (level >= ComponentCallbacks2.TRIM_MEMORY_RUNNING_LOW && level != ComponentCallbacks2.TRIM_MEMORY_UI_HIDDEN) chat.release()
    }
}
