// A stand-in for Apple's module of this name: signatures of what is used, for the type checker alone.
@_exported import CoreGraphics
@_exported import Foundation
@_exported import Observation

@MainActor @preconcurrency public protocol View {
    associatedtype Body: View
    @ViewBuilder @MainActor @preconcurrency var body: Body { get }
}
extension Never: View {
    public var body: Never { fatalError() }
}
/// What has no body of its own.
@MainActor @preconcurrency public protocol Primitive: View where Body == Never {}
extension Primitive {
    public var body: Never { fatalError() }
}
extension Optional: View where Wrapped: View {
    public var body: Never { fatalError() }
}
public struct EmptyView: Primitive {
    public nonisolated init() {}
}
public struct TupleView<T>: Primitive {}
public struct Either<A: View, B: View>: Primitive {}
@resultBuilder public struct ViewBuilder {
    public static func buildBlock() -> EmptyView { fatalError() }
    public static func buildBlock<C: View>(_ content: C) -> C { content }
    public static func buildBlock<each C: View>(_ content: repeat each C) -> TupleView<(repeat each C)> { fatalError() }
    public static func buildExpression<C: View>(_ content: C) -> C { content }
    public static func buildIf<C: View>(_ content: C?) -> C? { content }
    public static func buildEither<A: View, B: View>(first: A) -> Either<A, B> { fatalError() }
    public static func buildEither<A: View, B: View>(second: B) -> Either<A, B> { fatalError() }
}

@MainActor @preconcurrency public protocol Scene {
    associatedtype Body: Scene
    @SceneBuilder @MainActor @preconcurrency var body: Body { get }
}
extension Never: Scene {}
@resultBuilder public struct SceneBuilder {
    public static func buildBlock<C: Scene>(_ content: C) -> C { content }
}
public struct WindowGroup<Content: View>: Scene {
    public init(@ViewBuilder content: () -> Content) { fatalError() }
    public var body: Never { fatalError() }
}
@MainActor @preconcurrency public protocol App {
    associatedtype Body: Scene
    @SceneBuilder @MainActor @preconcurrency var body: Body { get }
    @MainActor @preconcurrency init()
}
extension App {
    @MainActor public static func main() { fatalError() }
}

@propertyWrapper @dynamicMemberLookup public struct Binding<Value> {
    public init(get: @escaping () -> Value, set: @escaping (Value) -> Void) { fatalError() }
    public var wrappedValue: Value {
        get { fatalError() }
        nonmutating set { fatalError() }
    }
    public var projectedValue: Binding<Value> { self }
    public subscript<T>(dynamicMember keyPath: WritableKeyPath<Value, T>) -> Binding<T> { fatalError() }
}
@propertyWrapper public struct State<Value> {
    public init(wrappedValue: Value) { fatalError() }
    public var wrappedValue: Value {
        get { fatalError() }
        nonmutating set { fatalError() }
    }
    public var projectedValue: Binding<Value> { fatalError() }
}
extension State where Value: ExpressibleByNilLiteral {
    public init() { fatalError() }
}
@propertyWrapper @dynamicMemberLookup public struct Bindable<Value: AnyObject & Observable> {
    public init(wrappedValue: Value) { fatalError() }
    public var wrappedValue: Value {
        get { fatalError() }
        set { fatalError() }
    }
    public var projectedValue: Bindable<Value> { self }
    public subscript<T>(dynamicMember keyPath: ReferenceWritableKeyPath<Value, T>) -> Binding<T> { fatalError() }
}
public struct DismissAction {
    @MainActor public func callAsFunction() { fatalError() }
}
public struct EnvironmentValues {
    public var dismiss: DismissAction { fatalError() }
}
@propertyWrapper public struct Environment<Value> {
    public init(_ keyPath: KeyPath<EnvironmentValues, Value>) { fatalError() }
    public var wrappedValue: Value { fatalError() }
}

public struct LocalizedStringKey: ExpressibleByStringInterpolation {
    public init(stringLiteral value: String) { fatalError() }
}
public enum Axis: Sendable { case horizontal, vertical }
public struct HorizontalAlignment: Sendable { public static var leading: Self { fatalError() } }
public struct Alignment: Sendable { public static var center: Self { fatalError() } }
public struct UnitPoint: Sendable { public static var bottom: Self { fatalError() } }
public struct Font: Sendable {
    public static var headline: Font { fatalError() }
    public static var footnote: Font { fatalError() }
}
public protocol ShapeStyle: Sendable {}
public struct Color: ShapeStyle, Primitive {
    public static var accentColor: Color { fatalError() }
    public nonisolated func opacity(_ opacity: Double) -> Color { fatalError() }
}
extension ShapeStyle where Self == Color {
    public static var red: Color { fatalError() }
    public static var green: Color { fatalError() }
    public static var secondary: Color { fatalError() }
}
public protocol Shape {}
public struct RoundedRectangle: Shape { public init(cornerRadius: CGFloat) { fatalError() } }
public struct ButtonRole: Sendable { public static var destructive: ButtonRole { fatalError() } }
public struct ToolbarItemPlacement { public static var primaryAction: Self { fatalError() } }
public protocol ToolbarContent {}
public struct ToolbarItem<Content: View>: ToolbarContent {
    @MainActor public init(placement: ToolbarItemPlacement, @ViewBuilder content: () -> Content) { fatalError() }
}
@resultBuilder public struct ToolbarContentBuilder {
    public static func buildBlock<C: ToolbarContent>(_ content: C) -> C { content }
}
public struct AccessibilityChildBehavior { public static var combine: Self { fatalError() } }
public struct TextInputAutocapitalization: Sendable { public static var never: Self { fatalError() } }
public protocol LabelStyle {}
public struct IconOnlyLabelStyle: LabelStyle {}
extension LabelStyle where Self == IconOnlyLabelStyle { public static var iconOnly: Self { fatalError() } }
public protocol TextFieldStyle {}
public struct RoundedBorderTextFieldStyle: TextFieldStyle {}
extension TextFieldStyle where Self == RoundedBorderTextFieldStyle { public static var roundedBorder: Self { fatalError() } }
public protocol TextSelectability {}
public struct EnabledTextSelectability: TextSelectability {}
extension TextSelectability where Self == EnabledTextSelectability { public static var enabled: Self { fatalError() } }
